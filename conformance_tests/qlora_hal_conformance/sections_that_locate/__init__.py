"""What is looked at after a red run, to say what is wrong and what is still right. Nothing is judged here."""
