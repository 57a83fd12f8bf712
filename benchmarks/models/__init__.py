"""What a real model gives per second from pages, beside ``transformers`` on the same cores."""
