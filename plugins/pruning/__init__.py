"""What visual pruners share."""
