"""The history of the tables: one file for each change under `versions/`. `serve_app.db.schema` applies them."""
