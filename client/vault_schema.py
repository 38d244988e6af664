"""The tables of a vault's database, and what brings older ones up to date."""

from homefire.client import vault_adapters, vault_log, vault_records

SETTINGS = """
CREATE TABLE settings (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT
"""
# One row for each thing that was deleted since the last sweep.
UNSWEPT = """
CREATE TABLE unswept (number INTEGER PRIMARY KEY AUTOINCREMENT) STRICT

CREATE TRIGGER record_to_sweep AFTER DELETE ON records BEGIN
    INSERT INTO unswept VALUES (NULL);
END

CREATE TRIGGER text_to_sweep AFTER UPDATE OF text, prompt ON records BEGIN
    INSERT INTO unswept VALUES (NULL);
END

CREATE TRIGGER adapter_to_sweep AFTER DELETE ON adapters BEGIN
    INSERT INTO unswept VALUES (NULL);
END

CREATE TRIGGER setting_to_sweep AFTER DELETE ON settings BEGIN
    INSERT INTO unswept VALUES (NULL);
END
"""
SCHEMAS = (vault_records.SCHEMA, vault_adapters.SCHEMA, vault_log.SCHEMA, SETTINGS, UNSWEPT)
# Never changed once released, only followed by others: a vault carries out those that it lacks.
MIGRATIONS = ("\n".join(SCHEMAS),)
