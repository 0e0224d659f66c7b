"""What commands show: tables, progress, one number format."""
