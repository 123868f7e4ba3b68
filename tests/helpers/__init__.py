"""What tests share: models, tolerances, checks, and the scripts that write what is compared."""
