"""What commands show: one table for a person, the same facts as data for a program."""
