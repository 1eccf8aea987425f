"""HTTP: a router per dialect over `service.py`, which talks to the engine. Importing this package imports nothing."""
