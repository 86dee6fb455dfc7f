"""A server of artifacts: the Open Inference Protocol v2 over HTTP.

protocol, datatypes, signature   bytes to arrays, and back
batcher, ladder                  requests into batches of compiled sizes
warming, models                  versions: compiled, proved, swapped, shadowed
answering, raw                   a request from its body to its answer
application, guards, repository  messages of HTTP: routes, limits, tokens
page, documents                  for people: a page to try, a description
connection, gate, server         sockets, signals, and an end that loses nothing
"""
