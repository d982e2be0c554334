"""From measures of two arms to an interval, and from an interval to a verdict."""
