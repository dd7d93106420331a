"""The ways of computing a recurrent layer, behind one interface (see `base.Backend`)."""
