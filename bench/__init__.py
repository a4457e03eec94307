"""The measurements that README and CHANGELOG quote; `make bench` runs them all."""
