"""What jobs leave behind: folders, typed records, tables, and their export to MLflow."""
