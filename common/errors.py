"""The one exception for what a user can mend."""


class UserError(Exception):
    """A mistake that the user can mend; a script shows it as one line and exits with code 2."""
