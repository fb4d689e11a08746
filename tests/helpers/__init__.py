"""What tests share: real servers and databases, processes, small models and data."""
