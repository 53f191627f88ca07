"""The methods. A file's name is the method's name in a recipe; files with a leading underscore are shared parts."""
