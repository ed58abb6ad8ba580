package remotes

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// Limits are a registry's rate limits as its reply states them.
type Limits struct {
	Limit     int64         // requests per window; -1 if not stated
	Remaining int64         // requests left; -1 if not stated
	Window    time.Duration // 0 if not stated
	Source    string        // whose requests are counted, such as an address; "" if not stated
}

// RateLimits returns the limits that a registry states in reply to a HEAD request, which Docker Hub doesn't count.
// NotFound if it states none.
func RateLimits(ctx context.Context, remote Remote, object string) (Limits, error) {
	r, ok := remote.(*Registry)
	if !ok {
		return Limits{}, classf(errdefs.ErrNotImplemented, "only registries have rate limits")
	}
	o, err := parseObject(object)
	if err != nil {
		return Limits{}, err
	}
	l, err := r.limits(ctx, o)
	if err != nil {
		return l, fmt.Errorf("limits of %s: %w", o.join(r.locator.String()), err)
	}
	return l, nil
}

func (r *Registry) limits(ctx context.Context, o object) (Limits, error) {
	c := r.own()
	req := r.request(c, http.MethodHead, "manifests", o.String())
	req.header.Set("Accept", accept(""))
	resp, err := c.do(ctx, req, c.newTries(maxTries))
	if err != nil {
		return Limits{}, err
	}
	resp.Body.Close()
	l := Limits{Source: printable(resp.Header.Get("Docker-Ratelimit-Source"))}
	get := func(name string) string {
		return cmp.Or(resp.Header.Get("Ratelimit-"+name), resp.Header.Get("X-Ratelimit-"+name))
	}
	l.Limit, l.Window = parseLimit(get("Limit"))
	var window time.Duration
	l.Remaining, window = parseLimit(get("Remaining"))
	l.Window = max(l.Window, window)
	if l.Limit < 0 && l.Remaining < 0 {
		return l, classf(errdefs.ErrNotFound, "%s states none", c.host)
	}
	return l, nil
}

// parseLimit parses "100;w=21600": a number, and a window in seconds.
func parseLimit(s string) (n int64, window time.Duration) {
	number, parameters, _ := strings.Cut(s, ";")
	n, err := strconv.ParseInt(strings.TrimSpace(number), 10, 64)
	if err != nil || n < 0 {
		return -1, 0
	}
	for p := range strings.SplitSeq(parameters, ";") {
		if seconds, ok := strings.CutPrefix(strings.TrimSpace(p), "w="); ok {
			if w, err := strconv.ParseInt(seconds, 10, 32); err == nil && w > 0 {
				window = time.Duration(w) * time.Second
			}
		}
	}
	return n, window
}
