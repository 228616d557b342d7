"""Parameter-efficient tuners on PEFT."""
