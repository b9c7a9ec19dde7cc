"""From finished runs to the tables and figures of the paper; reads only what the stages wrote."""
