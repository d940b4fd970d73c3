"""What runs tell: figures put together and tested, tables, and pictures of features."""
