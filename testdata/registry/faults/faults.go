// Package faults makes a registry misbehave on request, and counts the requests.
package faults

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"distkit/testdata/registry/layouts"
)

// Fault is one misbehaviour. It is in force until Times requests have met it, or for ever if Times is 0.
type Fault struct {
	Kind  string // one of Kinds
	Arg   string
	Path  string // a part of the request's path, or of "METHOD path"; empty: every request
	Times int
}

// Kinds describes each kind of fault and its argument.
var Kinds = map[string]string{
	"cut":          "BYTES of the body, then the connection is closed",
	"short":        "BYTES of the body, without a length, ended as if that were all",
	"status":       "STATUS[,RETRY-AFTER]",
	"ignore-range": "",
	"wrong-start":  "BYTES by which a 206 starts too early (Content-Range says so)",
	"lying-start":  "BYTES by which a 206 starts too early (Content-Range does not say so)",
	"wrong-bytes":  "",
	"html":         "",
	"drip":         "BYTES a second",
	"delay":        "DURATION before the answer",
	"hang":         "BYTES of the body, then nothing until the client leaves",
}

// Parse reads "KIND[=ARG] [path=PIECE] [times=N]".
func Parse(s string) (Fault, error) {
	var f Fault
	for i, word := range strings.Fields(s) {
		key, value, _ := strings.Cut(word, "=")
		switch {
		case i == 0:
			if _, ok := Kinds[key]; !ok {
				return f, fmt.Errorf("fault %q: no such kind", key)
			}
			f.Kind, f.Arg = key, value
		case key == "path":
			f.Path = value
		case key == "times":
			n, err := strconv.Atoi(value)
			if err != nil {
				return f, fmt.Errorf("fault %q: times: %w", s, err)
			}
			f.Times = n
		default:
			return f, fmt.Errorf("fault %q: unknown word %q", s, word)
		}
	}
	if f.Kind == "" {
		return f, fmt.Errorf("fault: a kind is missing")
	}
	if _, err := f.number(); err != nil {
		return f, err
	}
	return f, nil
}

// number is the argument as a number: bytes, nanoseconds or a status.
func (f Fault) number() (int64, error) {
	var n int64
	var err error
	switch f.Kind {
	case "cut", "short", "drip", "wrong-start", "lying-start", "hang":
		n, err = strconv.ParseInt(f.Arg, 10, 64)
	case "status":
		code, _, _ := strings.Cut(f.Arg, ",")
		n, err = strconv.ParseInt(code, 10, 64)
	case "delay":
		var d time.Duration
		d, err = time.ParseDuration(f.Arg)
		n = int64(d)
	}
	if err != nil {
		return 0, fmt.Errorf("fault %s: argument: %w", f.Kind, err)
	}
	return n, nil
}

// Count is the number of requests to one kind of endpoint, and of the bytes in the bodies of the responses.
type Count struct {
	Get   int   `json:"get"`
	Head  int   `json:"head"`
	Write int   `json:"write"`
	Bytes int64 `json:"bytes"`
}

// Request is a request and how it was answered.
type Request struct {
	Method string `json:"method"`
	Path   string `json:"path"`
	Range  string `json:"range,omitempty"`
	Status int    `json:"status"`
	Bytes  int64  `json:"bytes"`
	Fault  string `json:"fault,omitempty"`
}

// Handler wraps a registry. Apart from the registry's own paths it serves
//
//	GET /_stats      counts by kind (manifests, blobs, uploads, tags, referrers, other), JSON
//	GET /_log        the requests, one JSON object per line
//	DELETE /_stats   forgets both
//	POST /_fault     adds the faults in the body, one per line, as Parse reads them
//	DELETE /_fault   removes all faults
//
// Requests of these paths are not counted, and faults don't concern them.
type Handler struct {
	next http.Handler

	mu     sync.Mutex
	faults []*Fault
	used   map[*Fault]int
	log    []Request
}

// New wraps a registry.
func New(next http.Handler) *Handler { return &Handler{next: next, used: map[*Fault]int{}} }

// Add puts a fault in force. If several faults match a request, all of them apply.
func (h *Handler) Add(f Fault) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.faults = append(h.faults, &f)
}

// Clear removes all faults.
func (h *Handler) Clear() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.faults = nil
}

// Stats returns the counts of the requests so far, by kind.
func (h *Handler) Stats() map[string]Count {
	stats := map[string]Count{}
	for _, kind := range []string{"manifests", "blobs", "uploads", "tags", "referrers", "other"} {
		stats[kind] = Count{}
	}
	for _, r := range h.Log() {
		_, kind := layouts.Split(r.Path)
		c := stats[kind]
		switch r.Method {
		case http.MethodGet:
			c.Get++
		case http.MethodHead:
			c.Head++
		default:
			c.Write++
		}
		c.Bytes += r.Bytes
		stats[kind] = c
	}
	return stats
}

// Log returns the requests so far, in the order in which they were answered.
func (h *Handler) Log() []Request {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.log)
}

// Reset forgets the counts and the requests.
func (h *Handler) Reset() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.log = nil
}

func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if strings.HasPrefix(r.URL.Path, "/_") {
		h.control(w, r)
		return
	}
	faults := h.take(r)
	out := &body{ResponseWriter: w, ctx: r.Context(), limit: -1}
	entry := Request{Method: r.Method, Path: r.URL.Path, Range: r.Header.Get("Range")}
	for _, f := range faults {
		entry.Fault += " " + f.Kind
	}
	entry.Fault = strings.TrimSpace(entry.Fault)
	defer func() {
		p := recover()
		entry.Status, entry.Bytes = out.status, out.sent
		h.mu.Lock()
		h.log = append(h.log, entry)
		h.mu.Unlock()
		if p != nil || out.abort {
			panic(http.ErrAbortHandler)
		}
	}()
	if h.answered(out, r, faults) {
		return
	}
	h.next.ServeHTTP(out, r)
}

// take returns the faults that apply to this request, and counts them as used.
func (h *Handler) take(r *http.Request) []Fault {
	h.mu.Lock()
	defer h.mu.Unlock()
	var met []Fault
	for _, f := range h.faults {
		if !strings.Contains(r.Method+" "+r.URL.Path, f.Path) || f.Times > 0 && h.used[f] >= f.Times {
			continue
		}
		rangeOnly := f.Kind == "ignore-range" || f.Kind == "wrong-start" || f.Kind == "lying-start"
		if rangeOnly && r.Header.Get("Range") == "" {
			continue
		}
		h.used[f]++
		met = append(met, *f)
	}
	return met
}

// answered applies the faults. It reports whether the request has been answered.
func (h *Handler) answered(out *body, r *http.Request, faults []Fault) bool {
	for _, f := range faults {
		n, _ := f.number()
		switch f.Kind {
		case "delay":
			select {
			case <-time.After(time.Duration(n)):
			case <-r.Context().Done():
				return true
			}
		case "status":
			if _, after, ok := strings.Cut(f.Arg, ","); ok {
				out.Header().Set("Retry-After", after)
			}
			out.WriteHeader(int(n))
			return true
		case "html":
			out.Header().Set("Content-Type", "text/html; charset=utf-8")
			_, _ = io.WriteString(out, "<!DOCTYPE html>\n<title>Sign in</title>\n<p>Please accept the terms to go on.\n")
			return true
		case "ignore-range":
			r.Header.Del("Range")
		case "wrong-start", "lying-start":
			h.early(out, r, n, f.Kind == "lying-start")
			return true
		case "cut":
			out.limit, out.end = n, cutOff
		case "short":
			out.limit, out.end = n, endEarly
		case "hang":
			out.limit, out.end = n, hang
		case "wrong-bytes":
			out.flip = true
		case "drip":
			out.rate = n
		}
	}
	return false
}

// early answers a request for a Range from n bytes before the start of the range.
func (h *Handler) early(out *body, r *http.Request, n int64, lie bool) {
	var start int64
	_, _ = fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &start)
	r.Header.Set("Range", fmt.Sprintf("bytes=%d-", max(start-n, 0)))
	rec := httptest.NewRecorder()
	h.next.ServeHTTP(rec, r)
	for k, v := range rec.Header() {
		out.Header()[k] = v
	}
	if lie {
		_, total, _ := strings.Cut(rec.Header().Get("Content-Range"), "/")
		size, _ := strconv.ParseInt(total, 10, 64)
		out.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%s", start, size-1, total))
		rec.Body.Truncate(int(min(size-start, int64(rec.Body.Len()))))
		out.Header().Set("Content-Length", strconv.Itoa(rec.Body.Len()))
	}
	out.WriteHeader(rec.Code)
	_, _ = out.Write(rec.Body.Bytes())
}

func (h *Handler) control(w http.ResponseWriter, r *http.Request) {
	switch r.Method + " " + r.URL.Path {
	case "GET /_stats":
		_ = json.NewEncoder(w).Encode(h.Stats())
	case "GET /_log":
		e := json.NewEncoder(w)
		for _, entry := range h.Log() {
			_ = e.Encode(entry)
		}
	case "DELETE /_stats":
		h.Reset()
	case "POST /_fault":
		text, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
		for _, line := range strings.Split(strings.TrimSpace(string(text)), "\n") {
			var f Fault
			if err == nil {
				f, err = Parse(line)
			}
			if err == nil {
				h.Add(f)
			}
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
		}
	case "DELETE /_fault":
		h.Clear()
	default:
		http.NotFound(w, r)
	}
}

type ending int

const (
	cutOff ending = iota + 1
	endEarly
	hang
)

// body is the body of a response. It counts the bytes, and can fail on the way.
type body struct {
	http.ResponseWriter
	ctx    context.Context
	status int
	sent   int64
	limit  int64 // the number of bytes after which end happens; -1: never
	end    ending
	flip   bool
	rate   int64
	abort  bool
}

func (b *body) WriteHeader(status int) {
	if b.status == 0 {
		b.status = status
		if b.end == endEarly {
			b.Header().Del("Content-Length")
		}
	}
	b.ResponseWriter.WriteHeader(status)
}

func (b *body) Write(p []byte) (int, error) {
	if b.status == 0 {
		b.WriteHeader(http.StatusOK)
	}
	for done := 0; done < len(p); {
		n := len(p) - done
		if b.limit >= 0 {
			n = int(min(int64(n), b.limit-b.sent))
		}
		if b.rate > 0 {
			n = int(min(int64(n), max(b.rate/10, 1)))
		}
		if n > 0 {
			if err := b.send(p[done : done+n]); err != nil {
				return done, err
			}
			done += n
		}
		if b.limit >= 0 && b.sent >= b.limit {
			if err := b.finish(); err != nil {
				return done, err
			}
			break // the rest is dropped
		}
	}
	return len(p), nil
}

func (b *body) send(p []byte) error {
	if b.flip {
		p = slices.Clone(p)
		p[len(p)/2] ^= 0x20
	}
	n, err := b.ResponseWriter.Write(p)
	b.sent += int64(n)
	if err == nil && b.rate > 0 {
		err = b.flush()
		select {
		case <-time.After(time.Duration(n) * time.Second / time.Duration(b.rate)):
		case <-b.ctx.Done():
			err = b.ctx.Err()
		}
	}
	return err
}

// finish ends the body as the fault says.
func (b *body) finish() error {
	_ = b.flush()
	switch b.end {
	case hang:
		<-b.ctx.Done()
		b.abort = true
	case cutOff:
		b.abort = true
	case endEarly:
		return nil
	}
	return io.ErrShortWrite
}

func (b *body) flush() error { return http.NewResponseController(b.ResponseWriter).Flush() }
