"""What follows a finished run: talk to the model, merge its adapter. Nothing is trained here."""
