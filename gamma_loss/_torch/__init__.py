"""What torch adds inside: operators, compiled programs, ranks. Nothing here is public."""
