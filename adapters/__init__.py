"""Database adapters: one module per database behind the `Collection` protocol."""
