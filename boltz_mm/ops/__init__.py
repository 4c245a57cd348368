"""Custom operators; needs torch alone."""
