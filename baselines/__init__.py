"""One file a method: a recipe over `tfmq`. Methods never import each other."""
