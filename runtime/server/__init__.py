"""The HTTP server: routes, what they do, and the bundle in service.

admin.py             swaps from outside: by HTTP, or by a watched file
admission.py         which requests are admitted; users with requests in flight
app.py               the table of routes
bodies.py            the JSON bodies of requests and answers, and their limits
call.py              one request from arrival to answer: deadline, errors, clients that leave; what handlers share
deployment.py        one bundle in service
handlers.py          what each of the routes does
openapi.py           the OpenAPI document
openapi_examples.py  the requests in it, which tests send
operations.py        what each path accepts and answers
page.py              the page at /, which is page.html, and its sample users
similar.py           items like other items
swap.py              the active deployment, and how another takes over
"""
