from mlx_diffusiongemma.generate import main

raise SystemExit(main())
