package network

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"distkit/errclass"
	"distkit/runtime"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
)

// Bridge is the name of the network that needs no configuration: a bridge of the host with
// addresses of Subnet, the world reached by masquerading, and ports.
const Bridge = "bridge"

// Subnet has the addresses of [Bridge], the host's own the first.
const Subnet = "10.86.0.0/16"

// Leases are kept where they end with the boot, as do all that have one.
const bridge = `{
	"cniVersion": "1.0.0",
	"name": "distkit",
	"plugins": [
		{"type": "bridge", "bridge": "distkit0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
			"ipam": {"type": "host-local", "dataDir": "/run/distkit/addresses",
				"ranges": [[{"subnet": "` + Subnet + `"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
		{"type": "portmap", "capabilities": {"portMappings": true}}
	]
}`

// Config finds the configuration of a network: [Bridge], the path of a file (with a slash),
// or the name of one that dir (mostly /etc/cni/net.d) has. NotFound where there is none,
// InvalidArgument where it is none of CNI.
func Config(name, dir string) (*libcni.NetworkConfigList, error) {
	if strings.Contains(name, "/") {
		return read(name)
	}
	names, err := libcni.ConfFiles(dir, []string{".conf", ".conflist", ".json"})
	if err != nil {
		return nil, fmt.Errorf("network %s: %w", name, err)
	}
	var bad error
	for _, file := range names {
		config, err := read(file)
		if err != nil {
			bad = err
			continue
		}
		if config.Name == name {
			return config, nil
		}
	}
	if name == Bridge {
		return parse([]byte(bridge), Bridge)
	}
	if bad != nil {
		return nil, fmt.Errorf("network %s: not found in %s, where a file can't be used: %w", name, dir, bad)
	}
	return nil, errclass.Errorf(errdefs.ErrNotFound, "network %s: not found in %s", name, dir)
}

// Wanted is a network that is to be made.
type Wanted struct {
	config     *libcni.NetworkConfigList
	ports      []Port
	connection runtime.Connection
}

// Find is [Config], and with it what finds it again after a boot.
func Find(name, dir string, ports []Port) (*Wanted, error) {
	config, err := Config(name, dir)
	if err != nil {
		return nil, err
	}
	w := &Wanted{config: config, ports: ports, connection: runtime.Connection{Name: name}}
	if strings.Contains(name, "/") {
		w.connection.Name, err = filepath.Abs(name)
	} else {
		w.connection.ConfDir, err = filepath.Abs(dir)
	}
	for _, p := range ports {
		w.connection.Ports = append(w.connection.Ports, p.String())
	}
	return w, err
}

// Connection returns what a container's record keeps of the network, so that it can be made again.
func (w *Wanted) Connection() runtime.Connection { return w.connection }

func read(file string) (*libcni.NetworkConfigList, error) {
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		err = errclass.As(err, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	return parse(b, filepath.Base(file))
}

// parse takes a list of plugins, or one plugin's configuration.
func parse(b []byte, what string) (*libcni.NetworkConfigList, error) {
	config, err := libcni.NetworkConfFromBytes(b)
	if err == nil && len(config.Plugins) > 0 {
		return config, nil
	}
	one, oerr := libcni.NetworkPluginConfFromBytes(b)
	if oerr == nil {
		b, oerr = json.Marshal(map[string]any{
			"cniVersion": one.Network.CNIVersion, "name": one.Network.Name, "plugins": []json.RawMessage{b},
		})
	}
	if oerr == nil {
		config, oerr = libcni.NetworkConfFromBytes(b)
	}
	if oerr != nil {
		return nil, errclass.Errorf(errdefs.ErrInvalidArgument, "%s: %w", what, errors.Join(err, oerr))
	}
	return config, nil
}

// Port is a port of the host that leads to one of the network, as CNI's plugins take it.
type Port struct {
	HostIP        string `json:"hostIP,omitempty"`
	HostPort      uint16 `json:"hostPort"`
	ContainerPort uint16 `json:"containerPort"`
	Protocol      string `json:"protocol"` // tcp, udp or sctp
}

// String is the form that [ParsePort] takes.
func (p Port) String() string {
	s := fmt.Sprintf("%d:%d/%s", p.HostPort, p.ContainerPort, p.Protocol)
	switch {
	case strings.Contains(p.HostIP, ":"):
		s = "[" + p.HostIP + "]:" + s
	case p.HostIP != "":
		s = p.HostIP + ":" + s
	}
	return s
}

// ParsePort takes [IP:]HOST:CONTAINER[/PROTOCOL], an IPv6 address in brackets. InvalidArgument
// for anything else.
func ParsePort(s string) (p Port, err error) {
	bad := errclass.Errorf(errdefs.ErrInvalidArgument, "port %q: want [IP:]HOST:CONTAINER[/tcp|udp|sctp]", s)
	rest, protocol, has := strings.Cut(s, "/")
	p.Protocol = "tcp"
	if has {
		p.Protocol = strings.ToLower(protocol)
	}
	if p.Protocol != "tcp" && p.Protocol != "udp" && p.Protocol != "sctp" {
		return p, bad
	}
	i := strings.LastIndexByte(rest, ':')
	if i < 0 {
		return p, bad
	}
	host, container := rest[:i], rest[i+1:]
	if i := strings.LastIndexByte(host, ':'); i >= 0 {
		addr, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(host[:i], "["), "]"))
		if err != nil || addr.Is6() != strings.HasPrefix(host, "[") || addr.Zone() != "" {
			return p, bad
		}
		p.HostIP, host = addr.String(), host[i+1:]
	}
	for _, v := range []struct {
		text string
		to   *uint16
	}{{host, &p.HostPort}, {container, &p.ContainerPort}} {
		n, err := strconv.ParseUint(v.text, 10, 16)
		if err != nil || n == 0 {
			return p, bad
		}
		*v.to = uint16(n)
	}
	return p, nil
}

// check finds that all plugins are there, and that one maps ports, where there are any.
func (n *Networks) check(config *libcni.NetworkConfigList, ports []Port) error {
	maps := len(ports) == 0
	for _, p := range config.Plugins {
		if _, err := invoke.FindInPath(p.Network.Type, n.plugins); err != nil {
			return errclass.Errorf(errdefs.ErrNotImplemented, "network %s: CNI's plugin %s is not in %s (Debian: containernetworking-plugins)",
				config.Name, p.Network.Type, strings.Join(n.plugins, ", "))
		}
		maps = maps || p.Network.Capabilities["portMappings"]
	}
	if !maps {
		return errclass.Errorf(errdefs.ErrInvalidArgument, "no plugin of network %s maps ports", config.Name)
	}
	return nil
}
