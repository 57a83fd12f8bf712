"""The public checks catch what they are for: each wrong mask, operation, attention, layer and pool is named."""
