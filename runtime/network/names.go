package network

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"distkit/disk"
	"distkit/runtime/spec"

	types "github.com/containernetworking/cni/pkg/types/100"
	"golang.org/x/sys/unix"
)

// The files that resolve names in a container are mounted writable, like docker's. They are in a small file system of
// their own, so that no container fills the host's memory through them.
const (
	namesDir  = "etc"
	namesSize = 256 << 10
	// maxNames is the largest number of names of other networks in a hosts file.
	maxNames = 1000
)

// Lines in a hosts file that enclose the names of other networks. If a container removes them, it gets no more names.
const (
	namesBegin = "# begin names of this network\n"
	namesEnd   = "# end names of this network\n"
)

// hostResolvConf is the host's file. upstreamResolvConf is where systemd-resolved lists the servers behind its stub.
// They are variables for tests.
var (
	hostResolvConf     = "/etc/resolv.conf"
	upstreamResolvConf = "/run/systemd/resolve/resolv.conf"
)

// resolvConf returns the resolv.conf of a network. It is the host's with the replacements in names, and without name
// servers that a network can't reach. If no server is left, the file of systemd-resolved is used instead of the host's.
// With pasta, the host's servers are asked through pasta. servers reports whether the result has a name server.
func resolvConf(names spec.Names, by *pasta) (conf string, servers bool, err error) {
	host := ""
	for _, file := range []string{hostResolvConf, upstreamResolvConf} {
		b, err := os.ReadFile(file)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", false, err
		}
		if file == hostResolvConf {
			host = string(b)
		}
		if text, some := names.ResolvConf(string(b), true); some || file == hostResolvConf {
			conf, servers = text, some
		}
		if servers {
			break
		}
	}
	if _, local := names.ResolvConf(host, false); by != nil && !servers && local {
		names.Servers = []string{pastaDNS}
		conf, servers = names.ResolvConf(host, true)
	}
	return conf, servers, nil
}

// nameFiles returns the paths of the files that resolve names, by their paths in a container.
func (p place) nameFiles() map[string]string {
	files := map[string]string{}
	for _, name := range spec.NameFiles {
		files[name] = filepath.Join(p.dir, namesDir, path.Base(name))
	}
	return files
}

// writeNames writes the files that resolve names in the network. [Networks.announce] adds the names of other networks.
func (p place) writeNames(r request, result *types.Result) error {
	names := r.Names
	gateway := ""
	for _, ip := range result.IPs {
		if gateway == "" && len(ip.Gateway) > 0 {
			gateway = ip.Gateway.String()
		}
	}
	hosts, err := names.HostsFile(addresses(result), gateway)
	if err != nil {
		return err
	}
	resolv, _, err := resolvConf(names, r.Pasta)
	if err != nil {
		return err
	}
	dir := p.file(namesDir)
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	options := fmt.Sprintf("size=%d,nr_inodes=16,mode=755", namesSize)
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, options); err != nil {
		return fmt.Errorf("mount %s: %w", dir, err)
	}
	for name, text := range map[string]string{"hosts": hosts + namesBegin + namesEnd, "hostname": names.Hostname + "\n", "resolv.conf": resolv} {
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
		if err != nil {
			return err
		}
		_, err = f.WriteString(text)
		if err := errors.Join(err, f.Chmod(0o644), f.Close()); err != nil { // any user of a container may read it
			return err
		}
	}
	return nil
}

// lockAll locks all networks of the state directory, for what concerns several of them: ports and names.
func (n *Networks) lockAll(ctx context.Context) (*os.File, error) {
	return disk.LockFile(ctx, n.dir+".lock", os.O_RDWR|os.O_CREATE, 0o600, unix.LOCK_EX)
}

// announce updates the names of other networks in every network that is connected to the same one as p, in the same
// namespace of IDs. It is called with the lock of all networks, after one was connected or disconnected.
func (n *Networks) announce(p place, r request) error {
	type member struct {
		file, lines string
	}
	var all []member
	add := func(q place, other request) error {
		if !r.reaches(other) || other.Names.Hostname == "" {
			return nil
		}
		if net, ok := q.connected(other); ok {
			m := member{file: q.nameFiles()["/etc/hosts"]}
			for _, a := range addresses(net.Result) {
				m.lines += a + "\t" + other.Names.Hostname + "\n"
			}
			all = append(all, m)
		}
		return nil
	}
	_ = add(p, r)
	if err := n.others(p, add); err != nil {
		return err
	}
	for i, m := range all {
		var block strings.Builder
		for k, other := range all[:min(len(all), maxNames)] {
			if k != i {
				block.WriteString(other.lines)
			}
		}
		replaceNames(m.file, block.String())
	}
	return nil
}

// replaceNames replaces the names of other networks in a hosts file. A container has the file mounted and may write
// anything to it. So the file is not read beyond its possible length and never waited for, and it stays unchanged if it
// lacks the room or the marker lines. It is overwritten, not replaced, since the container has this very file mounted.
func replaceNames(file, names string) {
	f, err := os.OpenFile(file, os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return
	}
	b, err := io.ReadAll(io.LimitReader(f, namesSize))
	if err != nil {
		return
	}
	before, rest, begins := strings.Cut(string(b), namesBegin)
	_, after, ends := strings.Cut("\n"+rest, "\n"+namesEnd)
	if !begins || !ends {
		return
	}
	text := before + namesBegin + names + namesEnd + after
	if text == string(b) {
		return
	}
	// Allocate first: without room, a write would write only a part.
	if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, int64(len(text))); err == unix.ENOSPC || err == unix.EDQUOT {
		return
	}
	if _, err := f.WriteAt([]byte(text), 0); err == nil {
		_ = f.Truncate(int64(len(text)))
	}
}

// addresses returns the addresses in the plugins' result, without prefix lengths.
func addresses(result *types.Result) []string {
	var all []string
	for _, ip := range result.IPs {
		all = append(all, ip.Address.IP.String())
	}
	return slices.Compact(all)
}
