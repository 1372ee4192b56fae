# For tests alone, where the real image cannot be had: a Prometheus of the machine, laid out as the real one is.
ARG BASE
FROM ${BASE}
COPY prometheus /bin/prometheus
RUN mkdir -p /prometheus /etc/prometheus && chown 65534:65534 /prometheus \
 && printf '%s\n' '#!/bin/sh' 'exec python -I -c "import sys, urllib.request as u; u.urlopen(sys.argv[-1])" "$@"' > /usr/local/bin/wget \
 && chmod 755 /bin/prometheus /usr/local/bin/wget
USER 65534
WORKDIR /prometheus
VOLUME ["/prometheus"]
ENTRYPOINT ["/bin/prometheus"]
