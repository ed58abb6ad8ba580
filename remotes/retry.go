package remotes

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
)

const (
	maxTries   = 5
	firstPause = 200 * time.Millisecond
	// renewAfter is how many bytes of progress restore all tries.
	renewAfter = 4 << 10
)

// tries counts the tries that are left for an operation. Progress restores them.
type tries struct {
	most, left int
	first      time.Duration // the pause after the first failure; each later one is twice as long
	pause      time.Duration
	waited     time.Duration // because of Retry-After, since the last progress
	silent     time.Duration // without any data, since the last progress
	moved      int64         // bytes since the tries were restored
	hasNext    bool          // another host is asked if this one fails
}

func (c *client) newTries(n int) *tries { return newTries(n, c.pause) }

func newTries(n int, pause time.Duration) *tries {
	return &tries{most: n, left: n, first: pause, pause: pause}
}

// progress records the transfer of n bytes.
func (t *tries) progress(n int64) {
	if t.moved += n; t.moved >= renewAfter {
		*t = tries{most: t.most, left: t.most, first: t.first, pause: t.first, hasNext: t.hasNext}
	}
}

// next uses up a try and returns the pause before it. The pause is random, so that many processes don't come back at
// the same time.
func (t *tries) next() time.Duration {
	pause := t.pause
	t.left--
	t.pause *= 2
	return pause/2 + rand.N(pause/2+1)
}

// retry calls f until it succeeds, fails permanently, or has used up its tries. f must do everything that may have to
// be repeated, such as sending a request and reading its reply, and do it once.
func (c *client) retry(ctx context.Context, t *tries, f func() error) error {
	return t.retry(f, func(err error) error { return c.wait(ctx, t, err) })
}

// retry calls f until it succeeds. After an error it calls wait, which either waits before the next try or returns the
// error. This is the only loop that repeats requests.
func (t *tries) retry(f func() error, wait func(error) error) error {
	for {
		err := f()
		if err == nil {
			return nil
		}
		if err := wait(err); err != nil {
			return err
		}
	}
}

// wait waits before the next try after err, or returns err if no try is left.
func (t *tries) wait(ctx context.Context, err error) error {
	if t.isOver(ctx, err) {
		return err
	}
	return sleep(ctx, t.next())
}

// isOver reports whether err ends the tries.
func (t *tries) isOver(ctx context.Context, err error) bool {
	return !isWorthRetry(err) || ctx.Err() != nil || t.left <= 1
}

// wait waits before the next try after err, or returns err if no try is left. It waits at least as long as the registry
// asks for.
func (c *client) wait(ctx context.Context, t *tries, err error) error {
	if t.isOver(ctx, err) {
		return err
	}
	var stall *stallError
	if errors.As(err, &stall) {
		// The bound for silence applies to all tries together: a caching registry may start over to fetch an object
		// with each.
		if t.silent += stall.after; t.silent >= c.timeout {
			return err
		}
	}
	var asked *retryAfterError
	if !errors.As(err, &asked) {
		return t.wait(ctx, err)
	}
	if t.waited+asked.after > c.options.MaxWait {
		return fmt.Errorf("%w (the registry asks to wait %v)", err, asked.after)
	}
	// Such a wait uses up no try, because waits have their own bound: when many processes come back together, a
	// registry may turn some away again.
	t.waited += asked.after
	if c.options.Notify != nil {
		c.options.Notify(fmt.Sprintf("%s asks to wait %v: %d %s", c.host, asked.after, asked.status, http.StatusText(asked.status)))
	}
	return sleep(ctx, asked.after+rand.N(asked.after/8+1))
}

// isTemporary reports whether a failure may be gone later (exit status 6).
func isTemporary(err error) bool {
	return errdefs.IsAborted(err) || errdefs.IsDeadlineExceeded(err) || errdefs.IsResourceExhausted(err)
}

// isWorthRetry reports whether a failure may be gone within seconds.
func isWorthRetry(err error) bool {
	var dnsErr *net.DNSError
	noSuchHost := errors.As(err, &dnsErr) && dnsErr.IsNotFound
	return isTemporary(err) && !noSuchHost && !errors.Is(err, errToldToWait)
}

// retryAfterError is an error reply with a Retry-After header.
type retryAfterError struct {
	*statusError
	after time.Duration
}

func (e *retryAfterError) Unwrap() error { return e.statusError }

// retryAfter parses the Retry-After header. It is 0 if there is none.
func retryAfter(h http.Header) time.Duration {
	v := h.Get("Retry-After")
	if n, err := strconv.Atoi(v); err == nil && n >= 0 {
		return min(time.Duration(n), 1<<30) * time.Second
	}
	if t, err := http.ParseTime(v); err == nil {
		return max(time.Until(t).Round(time.Second), 0)
	}
	return 0
}

// finalError is an error after which no other host is tried.
type finalError struct{ error }

// firstHost calls f with each suitable host in order until one succeeds. Every host but the last gets a single try,
// because the next host serves as the retry. A host is skipped during its Retry-After, and shortly after another
// process found it down.
func (r *Registry) firstHost(ctx context.Context, need capability, f func(*client, *tries) error) error {
	var able []*client
	for _, c := range r.clients {
		if c.capabilities&need == need {
			able = append(able, c)
		}
	}
	err := r.errNoHost()
	for i, c := range able {
		if i == len(able)-1 {
			err = f(c, c.newTries(maxTries))
		} else if wait := c.sharedWait(); wait > 0 {
			err = c.toldToWait(wait)
			continue
		} else if c.isDown() {
			err = classf(errdefs.ErrAborted, "%s did not reply to another process", c.host)
			continue
		} else {
			t := c.newTries(1)
			t.hasNext = true
			err = f(c, t)
			if ctx.Err() == nil {
				c.markDown(err)
			}
		}
		if final, ok := err.(finalError); ok {
			return final.error
		}
		if err == nil || ctx.Err() != nil {
			return err
		}
	}
	return err
}

// own returns the client of the registry itself, which comes after its mirrors.
func (r *Registry) own() *client { return r.clients[len(r.clients)-1] }

func (r *Registry) errNoHost() error {
	return classf(errdefs.ErrFailedPrecondition, "no host of %s is configured for this", r.locator.Host)
}
