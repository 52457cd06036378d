"""The OpenAI-compatible HTTP server: `create_app` makes the application, `qwench serve` runs it."""
