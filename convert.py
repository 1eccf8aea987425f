from mlx_diffusiongemma.convert import main

raise SystemExit(main())
