"""Side commands, one a file; ``fedlora.arguments.TOOLS`` lists them."""
