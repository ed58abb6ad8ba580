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

// The files that a container finds names by are mounted in it for writing, as docker's are. They are in a file system of their
// own, so that no container fills the host's memory by them.
const (
	namesDir  = "etc"
	namesSize = 256 << 10
	// maxNames bounds the names of other networks that a hosts file has.
	maxNames = 1000
)

// The lines of a hosts file between which the other networks' names are. A container that removes them gets no more names.
const (
	namesBegin = "# begin names of this network\n"
	namesEnd   = "# end names of this network\n"
)

// hostResolvConf is the host's, and upstreamResolvConf is where systemd-resolved keeps the servers
// behind its stub. They are variables for tests.
var (
	hostResolvConf     = "/etc/resolv.conf"
	upstreamResolvConf = "/run/systemd/resolve/resolv.conf"
)

// resolvConf returns the resolv.conf of a network: the host's, with what names says in its place, and without the name servers
// that no network reaches. If no server is left, the file of systemd-resolved takes the place of the host's; by pasta, the host's
// servers are asked through it. Servers reports whether there is a name server in the end.
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

// nameFiles returns the paths of the files for names, by their paths in a container.
func (p place) nameFiles() map[string]string {
	files := map[string]string{}
	for _, name := range spec.NameFiles {
		files[name] = filepath.Join(p.dir, namesDir, path.Base(name))
	}
	return files
}

// writeNames makes the files that a container in the network finds names by. The names of other networks come by
// [Networks.announce].
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
		if err := errors.Join(err, f.Chmod(0o644), f.Close()); err != nil { // any user of a container reads it
			return err
		}
	}
	return nil
}

// lockAll locks the networks of the state directory, for what concerns more than one: ports and names.
func (n *Networks) lockAll(ctx context.Context) (*os.File, error) {
	return disk.LockFile(ctx, n.dir+".lock", os.O_RDWR|os.O_CREATE, 0o600, unix.LOCK_EX)
}

// announce gives each network that is connected to the same one as p, in the same namespace of IDs, the names and addresses of the
// others. It is called when one of them has come or gone, with the lock of all.
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

// replaceNames replaces the names of other networks in a hosts file. The file is mounted in a container, which may write what it
// likes: it is read no further than it can be long, it is not waited for, and one that has no room, or no such lines, stays
// as it is. It is not replaced by another file, since the container would keep the old one.
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
	// A write that finds no room has written a part.
	if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, int64(len(text))); err == unix.ENOSPC || err == unix.EDQUOT {
		return
	}
	if _, err := f.WriteAt([]byte(text), 0); err == nil {
		_ = f.Truncate(int64(len(text)))
	}
}

// addresses returns those that the plugins gave, without prefix lengths.
func addresses(result *types.Result) []string {
	var all []string
	for _, ip := range result.IPs {
		all = append(all, ip.Address.IP.String())
	}
	return slices.Compact(all)
}
