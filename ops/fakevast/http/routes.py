"""Which method and path is which call. Handlers are the functions of that name in instances.py and
account.py."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Route:
    """`access`: anyone, account (the customer's key), or instance (also that instance's own
    key)."""

    method: str
    pattern: re.Pattern[str]
    name: str
    access: str


_TABLE = """
GET    v0  gpu_names/unique                gpu_names          anyone
POST   v0  bundles                         search             anyone
PUT    v0  search/asks                     search_asks        anyone
PUT    v0  asks/<id>                       create             account
PUT    v0  launch_instance                 launch             account
GET    v1  instances                       list               account
GET    v0  instances                       list_v0            account
GET    v0  instances/filters               instance_filters   account
GET    v0  instances/<id>                  show               instance
PUT    v0  instances/<id>                  set_instance       instance
DELETE v0  instances/<id>                  destroy            instance
PUT    v0  instances/reboot/<id>           reboot             instance
PUT    v0  instances/recycle/<id>          recycle            instance
PUT    v0  instances/bid_price/<id>        change_bid         account
GET    v0  instances/pending-price-increases  price_increases  account
PUT    v0  instances/accept-price-increase accept_price       account
PUT    v0  instances/reject-price-increase reject_price       account
PUT    v0  instances/update_template/<id>  update_instance    account
GET    v0  instances/balance/<id>          balance            account
PUT    v0  instances/request_logs/<id>     logs               account
PUT    v0  instances/command/<id>          command            account
GET    v0  instances/<id>/ssh              instance_ssh       account
POST   v0  instances/<id>/ssh              attach_ssh         account
DELETE v0  instances/<id>/ssh/<key>        detach_ssh         account
GET    v0  ssh                             ssh_keys           account
POST   v0  ssh                             add_ssh_key        account
PUT    v0  ssh/<id>                        update_ssh_key     account
DELETE v0  ssh/<id>                        delete_ssh_key     account
GET    v0  users/current                   user               account
GET    v0  users/me/invoices               invoices           account
GET    v0  users/me/ipaddrs                ipaddrs            account
GET    v0  charges                         charges            account
GET    v1  invoices                        invoices_v1        account
GET    v0  template                        templates          account
GET    v0  auth/apikeys                    api_keys           account
POST   v0  auth/apikeys                    add_api_key        account
GET    v0  auth/apikeys/<id>               api_key            account
DELETE v0  auth/apikeys/<id>               delete_api_key     account
GET    v0  volumes                         volumes            account
GET    v0  secrets                         secrets            account
POST   v0  secrets                         add_secret         account
PUT    v0  secrets                         update_secret      account
DELETE v0  secrets                         delete_secret      account
"""


def _compile(line: str) -> Route:
    method, version, path, name, access = line.split()
    path = re.sub(r"<(\w+)>", r"(?P<\1>\\d+)", path)
    return Route(method, re.compile(rf"/api/{version}/{path}/?"), name, access)


ROUTES = [_compile(line) for line in _TABLE.strip().splitlines()]


def find_route(method: str, path: str) -> tuple[Route, dict[str, int]] | None:
    """The route of this call and the numbers in its path; None when the emulator does not know
    it."""
    for route in ROUTES:
        if route.method == method and (match := route.pattern.fullmatch(path)):
            return route, {name: int(value) for name, value in match.groupdict().items()}
    return None
