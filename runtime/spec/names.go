package spec

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// HostGateway, used instead of an address in [Names.Hosts], stands for the host's address in the container's network,
// as in docker.
const HostGateway = "host-gateway"

// NameFiles are the files that resolve names in a container, including its own name.
var NameFiles = []string{"/etc/hosts", "/etc/hostname", "/etc/resolv.conf"}

// Names configures how a container resolves host names.
type Names struct {
	Hostname string   `json:"hostname,omitempty"` // the container's own name
	Hosts    []string `json:"hosts,omitempty"`    // NAME:ADDRESS or NAME:host-gateway
	// Each list, if not empty, replaces the host's name servers, search domains or options. A search domain "." alone
	// means no search domains.
	Servers []string `json:"dns,omitempty"`
	Search  []string `json:"dnsSearch,omitempty"`
	Options []string `json:"dnsOptions,omitempty"`
}

// Given reports whether n sets anything besides the container's own name.
func (n Names) Given() bool { return len(n.Hosts) > 0 || n.Resolves() }

// Resolves reports whether n changes resolv.conf.
func (n Names) Resolves() bool { return len(n.Servers)+len(n.Search)+len(n.Options) > 0 }

// Check returns InvalidArgument if a name, an address or an option is not valid in its file.
func (n Names) Check() error {
	for _, s := range n.Hosts {
		if _, _, err := splitHost(s); err != nil {
			return err
		}
	}
	for _, s := range n.Servers {
		if _, err := netip.ParseAddr(s); err != nil {
			return invalid("name server %q is not an IP address", s)
		}
	}
	for what, list := range map[string][]string{"host name": {n.Hostname}, "search domain": n.Search, "option of resolv.conf": n.Options} {
		for _, s := range list {
			if !isWord(s) && (s != "" || what != "host name") {
				return invalid("%s %q: want letters, digits and . - _ :", what, s)
			}
		}
	}
	return nil
}

// isWord reports whether every program that reads one of the files sees s as a single word.
func isWord(s string) bool {
	return s != "" && len(s) <= 253 && !strings.ContainsFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune(".-_:", r)
	})
}

// splitHost splits NAME:ADDRESS.
func splitHost(s string) (name, address string, err error) {
	name, address, _ = strings.Cut(s, ":")
	address = strings.TrimSuffix(strings.TrimPrefix(address, "["), "]")
	if _, err := netip.ParseAddr(address); err != nil && address != HostGateway || !isWord(name) {
		return "", "", invalid("host %q: want NAME:ADDRESS or NAME:%s", s, HostGateway)
	}
	return name, address, nil
}

// HostsFile returns the text of /etc/hosts for a container with the addresses own. If there are none, it uses 127.0.1.1
// for the container's name, as Debian does. gateway is the host's address for the container. InvalidArgument: it is "",
// but a host needs it.
func (n Names) HostsFile(own []string, gateway string) (string, error) {
	var b strings.Builder
	b.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::\tip6-localnet\n" +
		"ff00::\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n")
	if len(own) == 0 {
		own = []string{"127.0.1.1"}
	}
	for _, a := range own {
		if n.Hostname != "" {
			fmt.Fprintf(&b, "%s\t%s\n", a, n.Hostname)
		}
	}
	err := n.writeHosts(&b, gateway)
	return b.String(), err
}

// AddHosts appends the hosts to the text of a hosts file.
func (n Names) AddHosts(file string) (string, error) {
	var b strings.Builder
	b.WriteString(strings.TrimSuffix(file, "\n") + "\n")
	err := n.writeHosts(&b, "")
	return b.String(), err
}

func (n Names) writeHosts(b *strings.Builder, gateway string) error {
	for _, s := range n.Hosts {
		name, address, err := splitHost(s)
		if err != nil {
			return err
		}
		if address == HostGateway {
			address = gateway
		}
		if address == "" {
			return invalid("host %q: this network has no gateway", s)
		}
		fmt.Fprintf(b, "%s\t%s\n", address, name)
	}
	return nil
}

// ResolvConf returns the text of a container's resolv.conf, made from the host's. servers reports whether it has a name
// server. If isolated is true, the container has its own network, where it can't reach the host's loopback addresses,
// or addresses of a link of the host, such as fe80::1%eth0. Such servers are left out.
func (n Names) ResolvConf(host string, isolated bool) (conf string, servers bool) {
	var b strings.Builder
	for line := range strings.Lines(host) {
		words := append(strings.Fields(line), "", "")
		switch words[0] {
		case "nameserver":
			a, err := netip.ParseAddr(words[1])
			if len(n.Servers) > 0 || err == nil && isolated && (a.Unmap().IsLoopback() || a.Zone() != "") {
				continue
			}
			servers = servers || words[1] != ""
		case "search", "domain":
			if len(n.Search) > 0 {
				continue
			}
		case "options":
			if len(n.Options) > 0 {
				continue
			}
		}
		b.WriteString(strings.TrimRight(line, "\n") + "\n")
	}
	for _, s := range n.Servers {
		fmt.Fprintf(&b, "nameserver %s\n", s)
		servers = true
	}
	if len(n.Search) > 0 && !slices.Equal(n.Search, []string{"."}) {
		fmt.Fprintf(&b, "search %s\n", strings.Join(n.Search, " "))
	}
	if len(n.Options) > 0 {
		fmt.Fprintf(&b, "options %s\n", strings.Join(n.Options, " "))
	}
	return b.String(), servers
}
