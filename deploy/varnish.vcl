# Cometes behind Varnish 7. It works as it stands:
#
#   varnishd -F -n /tmp/varnish -a 127.0.0.1:8081 -f $PWD/deploy/varnish.vcl -p pipe_timeout=60
#
# TLS is left to you. bench/proxy_test.go runs this file, with other ports and 3 for 60.

vcl 4.1;

backend relay {
    .host = "127.0.0.1";
    .port = "8080";

    # As long as the relay may be silent: more than its -beat, and than the 55
    # seconds of the longest long-poll. pipe_timeout is the same for what is piped.
    .first_byte_timeout = 60s;
    .between_bytes_timeout = 60s;
}

sub vcl_recv {
    # Nobody but us says who they are. X-Forwarded-For, for -trust-proxy, Varnish
    # adds by itself.
    unset req.http.Fly-Client-IP;

    # What may be held open is piped: WebSocket comes through, and a client that
    # has left is let go at once. With pass in place of pipe all but WebSocket
    # come through too, but a client's going shows only when it is next written to.
    if (req.method == "GET" && req.url ~ "^/rooms/[^/?]+/") {
        return (pipe);
    }

    # Nothing here is worth a cache.
    return (pass);
}

sub vcl_pipe {
    # WebSocket. close stays in: what a client sends after a request that was
    # refused would reach the relay with what headers it likes.
    if (req.http.Upgrade) {
        set bereq.http.Upgrade = req.http.Upgrade;
        set bereq.http.Connection = "upgrade, close";
    }
}
