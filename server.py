from mlx_diffusiongemma.server import main

raise SystemExit(main())
