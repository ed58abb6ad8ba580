package network

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"distkit/errclass"
	"distkit/runtime"

	"github.com/containerd/errdefs"
)

// hostResolvConf is the host's, and upstreamResolvConf is where systemd-resolved keeps the servers
// behind its stub. They are variables for tests.
var (
	hostResolvConf     = "/etc/resolv.conf"
	upstreamResolvConf = "/run/systemd/resolve/resolv.conf"
)

// ResolvConf returns the path of a resolv.conf for networks: the host's, if no name server in it is on a
// loopback address, which no network reaches; else systemd-resolved's, if that is better; else a copy
// of the host's without those servers, in the state directory. Servers reports whether any name
// server is left. A host without a resolv.conf is NotFound.
func (n *Networks) ResolvConf() (path string, servers bool, err error) {
	b, err := os.ReadFile(hostResolvConf)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = errclass.As(err, errdefs.ErrNotFound)
		}
		return "", false, err
	}
	kept, usable, local := reachable(string(b))
	if local == 0 {
		return hostResolvConf, usable > 0, nil
	}
	if usable == 0 {
		up, err := os.ReadFile(upstreamResolvConf)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", false, err
		}
		if _, usable, local := reachable(string(up)); usable > 0 && local == 0 {
			return upstreamResolvConf, true, nil
		}
	}
	state := filepath.Dir(n.dir)
	if err := runtime.PrivateDir(state); err != nil {
		return "", false, err
	}
	// The name is one for all networks, so that what was written into a container's config.json holds
	// after a boot, too. Any user of a container reads the file, whatever the umask here.
	f, err := os.CreateTemp(state, "resolv.conf.")
	if err != nil {
		return "", false, err
	}
	path = filepath.Join(state, "resolv.conf")
	_, err = f.WriteString(kept)
	if err == nil {
		err = f.Chmod(0o644)
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
		return "", false, fmt.Errorf("write resolv.conf: %w", err)
	}
	return path, usable > 0, nil
}

// reachable returns a resolv.conf without the name servers on loopback addresses, and counts the
// others and these.
func reachable(conf string) (kept string, usable, local int) {
	var b strings.Builder
	for line := range strings.Lines(conf) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "nameserver" {
			if a, err := netip.ParseAddr(f[1]); err == nil && a.Unmap().IsLoopback() {
				local++
				continue
			}
			usable++
		}
		b.WriteString(line)
	}
	return b.String(), usable, local
}
