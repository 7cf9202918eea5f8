collect_ignore = ["pictures.py"]  # it imports matplotlib, which the tests do without
