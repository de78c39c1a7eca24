"""What has which colour: the same meaning, the same colour, in every panel and in both themes."""

GREEN, YELLOW, ORANGE, RED, BLUE, TEXT = "green", "yellow", "orange", "red", "blue", "text"
# What is neither good nor bad, with a white text on it: no data, too little data. A theme has no name for it.
NEUTRAL = "#6c7280"

# Red is for failed alone, so that it cannot be overlooked.
STATUSES = {"done": GREEN, "failed": RED, "running": BLUE, "pending": YELLOW, "unknown": NEUTRAL}

OWNERS = {"caller": "#5794f2", "account": "#b877d9", "upstream": "#ff9830", "unknown": "#8e8e8e"}

# Shades of the colour of the owner: who has to act is seen before the names are read.
REASONS = {
    "caller": {
        "token_limit": "#1250b0",
        "content_blocked": "#3274d9",
        "invalid_request": "#5794f2",
        "model_not_found": "#8ab8ff",
        "location_unsupported": "#b9d4ff",
    },
    "account": {"insufficient_credits": "#8f3bb8", "permission_denied": "#ca95e5"},
    "upstream": {
        "quota_exceeded": "#ff9830",
        "provider_billing": "#8c5200",
        "overloaded": "#f2cc0c",
        "internal_error": "#c4701c",
        "timeout": "#ffc069",
        "malformed_response": "#a68a00",
        "network_error": "#ffe999",
    },
    "unknown": {"other": "#8e8e8e", "unspecified": "#c4c4c4"},
}
# Reasons that a user's rules add have names that nobody knows here: shades of a colour that no owner has.
OWN_REASONS = "#37b7a4"

# The models that lead a ranking, first to last, and all the others: Grafana's palettes give red to a model.
RANKS = ("#5794f2", "#f2cc0c", "#b877d9", "#37b7a4", "#ff9830", "#1250b0", "#a68a00", "#8ab8ff")
REST = "#8e8e8e"

# Why a listing failed: none is red, which is for failed tasks alone.
CAUSES = {
    "auth": "#b877d9",
    "rate_limited": "#f2cc0c",
    "http": "#ff9830",
    "timeout": "#8ab8ff",
    "connection": "#5794f2",
    "payload": "#37b7a4",
    "too_large": "#a68a00",
    "ledger": "#8e8e8e",
}
