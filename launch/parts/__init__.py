"""What the commands are made of; none of these is a command."""
