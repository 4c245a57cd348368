"""What a user holds: models built from config and checkpoint, and measurements of them."""
