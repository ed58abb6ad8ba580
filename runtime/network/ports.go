package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"distkit/errclass"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// overlaps reports whether two ports exclude each other: they are the same port of an address that both include.
func (p Port) overlaps(q Port) bool {
	return p.HostPort == q.HostPort && p.Protocol == q.Protocol && (p.HostIP == q.HostIP || p.covers(q) || q.covers(p))
}

// covers reports whether p is a port of all addresses of q's family.
func (p Port) covers(q Port) bool {
	switch p.HostIP {
	case "":
		return true
	case "0.0.0.0", "::":
		a, err := netip.ParseAddr(q.HostIP)
		return err == nil && a.Is6() == (p.HostIP == "::")
	}
	return false
}

// host formats the host's side of a port for messages.
func (p Port) host() string {
	if p.HostIP == "" {
		return fmt.Sprintf("port %d/%s", p.HostPort, p.Protocol)
	}
	return fmt.Sprintf("port %d/%s of %s", p.HostPort, p.Protocol, p.HostIP)
}

// checkFree returns Unavailable if a process on the host has the port. A process may still take the port later.
func (p Port) checkFree() error {
	addresses := []string{p.HostIP}
	if p.HostIP == "" {
		addresses = []string{"0.0.0.0", "::"}
	}
	for _, text := range addresses {
		a, err := netip.ParseAddr(text)
		if err != nil {
			return err
		}
		switch err := bind(a, p); {
		case err == nil, p.HostIP == "" && (errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EADDRNOTAVAIL)): // a kernel without IPv6
		case errors.Is(err, unix.EPROTONOSUPPORT): // a kernel without SCTP has no such ports
		case errors.Is(err, unix.EADDRINUSE):
			return errclass.Errorf(errdefs.ErrUnavailable, "%s is taken: a process of this host has it", p.host())
		case errors.Is(err, unix.EACCES):
			return errclass.Errorf(errdefs.ErrPermissionDenied, "%s is not for ordinary users: take one from the sysctl net.ipv4.ip_unprivileged_port_start on", p.host())
		default:
			return fmt.Errorf("%s: %w", p.host(), err)
		}
	}
	return nil
}

// bind takes the port of an address for a moment. It does not listen, so nobody can connect.
func bind(a netip.Addr, p Port) error {
	family, kind, protocol := unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_TCP
	var to unix.Sockaddr = &unix.SockaddrInet4{Port: int(p.HostPort)}
	if a.Is6() {
		family, to = unix.AF_INET6, &unix.SockaddrInet6{Port: int(p.HostPort), Addr: a.As16()}
	} else {
		to.(*unix.SockaddrInet4).Addr = a.As4()
	}
	switch p.Protocol {
	case "udp":
		kind, protocol = unix.SOCK_DGRAM, unix.IPPROTO_UDP
	case "sctp":
		protocol = unix.IPPROTO_SCTP
	}
	s, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	if a.Is6() {
		_ = unix.SetsockoptInt(s, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
	}
	if kind == unix.SOCK_STREAM { // lets connections that have ended not count
		_ = unix.SetsockoptInt(s, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}
	return unix.Bind(s, to)
}

// reserve makes the network's namespace, which also reserves its ports: of two networks that want the same port, one
// gets it. If a killed process has left a network with such a port, that is disconnected. Unavailable: another network
// or a process on the host has one of the ports.
func (n *Networks) reserve(ctx context.Context, p place, r request) error {
	for {
		other, err := n.tryReserve(ctx, p, r)
		if other == nil {
			return err
		}
		of := &Networks{n.dir, other.Namespace, n.plugins}
		if derr := of.Down(ctx, other.ID); derr != nil {
			return fmt.Errorf("%w: %w", err, derr)
		}
	}
}

// tryReserve is one attempt of reserve. If a network that is not connected has one of the ports, it returns that.
func (n *Networks) tryReserve(ctx context.Context, p place, r request) (other *request, err error) {
	if len(r.Ports) > 0 {
		lock, err := n.lockAll(ctx)
		if err != nil {
			return nil, err
		}
		defer lock.Close()
		if other, err := n.taken(p, r); err != nil {
			return other, err
		}
	}
	if err := makeNamespace(p.file("netns")); err != nil {
		return nil, fmt.Errorf("make namespace: %w", err)
	}
	return nil, nil
}

// taken returns an error if one of the ports is taken, and the network that has it if that is not connected.
func (n *Networks) taken(p place, r request) (half *request, err error) {
	for _, port := range r.Ports {
		if err := port.checkFree(); err != nil {
			return nil, err
		}
	}
	err = n.others(p, func(q place, other request) error {
		if _, err := os.Lstat(q.file("netns")); errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		for _, mine := range r.Ports {
			if slices.ContainsFunc(other.Ports, mine.overlaps) {
				if _, ok := q.connected(other); !ok {
					half = &other
				}
				return errclass.Errorf(errdefs.ErrUnavailable, "%s is taken: network %s has it", mine.host(), other.ID)
			}
		}
		return nil
	})
	return half, err
}

// others calls f with each other network of the state directory that has a request, in any namespace of IDs.
func (n *Networks) others(p place, f func(place, request) error) error {
	entries, err := os.ReadDir(n.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("list networks: %w", err)
	}
	for _, e := range entries {
		q := place{dir: filepath.Join(n.dir, e.Name())}
		if q.dir == p.dir {
			continue
		}
		r, err := q.request()
		if err != nil {
			continue // it is being made or removed
		}
		if err := f(q, r); err != nil {
			return err
		}
	}
	return nil
}
