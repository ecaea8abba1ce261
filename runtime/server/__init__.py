"""The HTTP server: routes, what they do, and the bundle in service.

admin.py             swaps from outside: by token, or by a watched file
admission.py         who may wait, and for how long; who is being answered
app.py               the table of routes
bodies.py            what clients send and get, and how much of it at once
call.py              one request from arrival to answer: deadline, errors, clients that leave; what handlers share
deployment.py        one bundle in service
handlers.py          what each of the routes does
openapi.py           what the server's paths take and answer, as OpenAPI
openapi_examples.py  the requests in it, which tests send
operations.py        what a path of the server takes and answers, beside its handler
page.py              the page at /, which is page.html, and its sample users
similar.py           items like other items
swap.py              the active deployment, and how another takes over
"""
