"""The HTTP server, tested as a process of its own over real sockets. Needs the `server` and `test` extras."""
