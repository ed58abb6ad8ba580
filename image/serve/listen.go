package serve

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"sync"
	"time"
)

// Limits of a connection. A client that doesn't complete a request in time, or is idle for too long, is disconnected.
const (
	maxHeader      = 32 << 10
	headerPatience = 10 * time.Second
	idlePatience   = 3 * time.Minute
	// farewell is how long current replies may take once the server is to end.
	farewell = 5 * time.Second
)

// Serve serves on a listener until ctx is done or the listener ends. At most max connections are open: a new one
// replaces the one that has been idle longest, or waits if none is idle. It uses TLS if config is not nil. If ctx has
// ended it, the error is ctx's cause.
func (s *Server) Serve(ctx context.Context, l net.Listener, max int, config *tls.Config) error {
	b := newBound(l, max)
	_, b.once = l.(*single)
	b.parks = config == nil && !b.once
	// With HTTP/2 one connection could request hundreds of replies at once.
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	server := &http.Server{
		Handler: s, MaxHeaderBytes: maxHeader, ReadHeaderTimeout: headerPatience, IdleTimeout: idlePatience,
		TLSConfig: config, Protocols: &protocols, ConnState: b.changed, ErrorLog: log.New(io.Discard, "", 0),
		BaseContext: func(net.Listener) context.Context { return context.WithoutCancel(ctx) },
	}
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		patience, cancel := context.WithTimeout(context.WithoutCancel(ctx), farewell)
		defer cancel()
		if server.Shutdown(patience) != nil {
			_ = server.Close()
		}
	})
	var err error
	if config != nil {
		err = server.ServeTLS(b, "", "")
	} else {
		err = server.Serve(b)
	}
	if !stop() {
		<-ended
		return context.Cause(ctx)
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// bound is a listener that counts its connections. For each idle one net/http keeps two buffers and a stack; so bound
// takes idle connections back, and hands them out again when the next request begins.
type bound struct {
	net.Listener
	max   int
	once  bool // there is one connection, and the listener ends with it
	parks bool // idle connections are taken back

	listen sync.Once
	fresh  chan accepted // new connections
	woken  chan net.Conn // connections on which the next request has begun
	closed chan struct{}

	mu   sync.Mutex
	free *sync.Cond
	// resting says since when each connection has been idle; the zero time means that a request is being served.
	resting map[net.Conn]time.Time
	ended   bool // closed has been closed
}

type accepted struct {
	net.Conn
	error
}

func newBound(l net.Listener, max int) *bound {
	b := &bound{
		Listener: l, max: max, fresh: make(chan accepted), woken: make(chan net.Conn), closed: make(chan struct{}),
		resting: map[net.Conn]time.Time{},
	}
	b.free = sync.NewCond(&b.mu)
	return b
}

// Accept implements net.Listener.
func (b *bound) Accept() (net.Conn, error) {
	b.listen.Do(func() { go b.admit() })
	var c net.Conn
	select {
	case c = <-b.woken:
	case a := <-b.fresh:
		if a.error != nil {
			return nil, a.error
		}
		c = a.Conn
	case <-b.closed:
		return nil, net.ErrClosed
	}
	if b.parks {
		c = &lease{Conn: c, bound: b}
	}
	return c, nil
}

// admit accepts connections while there is space, or an idle one can be closed.
func (b *bound) admit() {
	for {
		c, err := b.Listener.Accept()
		if err == nil && !b.enter(c) {
			_ = c.Close()
			return
		}
		select {
		case b.fresh <- accepted{c, err}:
		case <-b.closed:
			if err == nil {
				_ = c.Close()
			}
			return
		}
		if errors.Is(err, net.ErrClosed) || errors.Is(err, io.EOF) {
			return
		}
	}
}

// enter waits for space for a connection, and counts it. It returns false if the listener is closed.
func (b *bound) enter(c net.Conn) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	for len(b.resting) >= b.max && !b.ended {
		if idle := b.longestIdle(); idle != nil {
			delete(b.resting, idle)
			_ = idle.Close()
			break
		}
		b.free.Wait()
	}
	if !b.ended {
		b.resting[c] = time.Now()
	}
	return !b.ended
}

// leave closes a connection that net/http doesn't have.
func (b *bound) leave(c net.Conn) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.resting, c)
	_ = c.Close()
	b.free.Signal()
}

// Close implements net.Listener. It also closes idle connections.
func (b *bound) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.ended {
		b.ended = true
		close(b.closed)
		b.free.Broadcast()
		for c, since := range b.resting {
			if b.parks && !since.IsZero() {
				_ = c.Close()
			}
		}
	}
	return b.Listener.Close()
}

func (b *bound) longestIdle() (longest net.Conn) {
	for c, since := range b.resting {
		if !since.IsZero() && (longest == nil || since.Before(b.resting[longest])) {
			longest = c
		}
	}
	return longest
}

// changed tracks the state of a connection.
func (b *bound) changed(c net.Conn, state http.ConnState) {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	l, leased := c.(*lease)
	if leased {
		c = l.Conn
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	since, counted := b.resting[c]
	switch state {
	case http.StateActive:
		since = time.Time{}
	case http.StateIdle:
		since = time.Now()
		if leased {
			l.next.Store(idle)
		}
	case http.StateClosed, http.StateHijacked:
		if leased && l.parked.Load() {
			return // the connection stays open without the lease
		}
		delete(b.resting, c)
		if b.once {
			close(b.Listener.(*single).ended)
		}
		counted = false
	}
	if counted {
		b.resting[c] = since
	}
	b.free.Signal()
}

// Single returns a listener that accepts one connection, and ends with it.
func Single(c net.Conn) net.Listener {
	return &single{conn: c, ended: make(chan struct{})}
}

type single struct {
	conn  net.Conn
	given bool
	ended chan struct{}
}

func (s *single) Accept() (net.Conn, error) {
	if s.given {
		<-s.ended
		return nil, io.EOF
	}
	s.given = true
	return s.conn, nil
}

func (s *single) Close() error   { return nil }
func (s *single) Addr() net.Addr { return s.conn.LocalAddr() }
