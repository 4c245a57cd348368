"""What a user holds: inferencers and predictors."""
