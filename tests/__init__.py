"""Tests of BACo's behaviour on real pairs."""
