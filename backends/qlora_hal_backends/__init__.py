"""The backends that come with qlora_hal. Each subpackage is light until its trainer is opened."""
