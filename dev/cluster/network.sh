#!/bin/bash
# network.sh [SECONDS [TIMES]]: bytes a second that each network port of this machine sends and receives, InfiniBand and RoCE by their own counters, the rest by the
# kernel's. Every SECONDS (default 1), TIMES times (default: until it is stopped). A run at rest, a run that trains: what lies between is its traffic.
interval=${1:-1} times=${2:-0}

# name sent received, in bytes, of each port
counters() {
    local port device
    for port in /sys/class/infiniband/*/ports/*/counters; do
        [ -r "$port/port_xmit_data" ] || continue
        device=${port#/sys/class/infiniband/}
        # in words of four bytes
        echo "${device%%/*} $(($(cat "$port/port_xmit_data") * 4)) $(($(cat "$port/port_rcv_data") * 4))"
    done
    for device in /sys/class/net/*/statistics; do
        [ -r "$device/tx_bytes" ] || continue
        port=${device%/statistics}
        echo "${port##*/} $(cat "$device/tx_bytes") $(cat "$device/rx_bytes")"
    done
}

declare -A sent received
for ((turn = 0; times == 0 || turn <= times; turn++)); do
    while read -r name tx rx; do
        if [ $turn -gt 0 ]; then
            awk -v name="$name" -v tx=$((tx - sent[$name])) -v rx=$((rx - received[$name])) -v seconds="$interval" \
                'BEGIN { printf "%-12s sent %10.3f GB/s   received %10.3f GB/s\n", name, tx / seconds / 1e9, rx / seconds / 1e9 }'
        fi
        sent[$name]=$tx received[$name]=$rx
    done < <(counters)
    [ $turn -gt 0 ] && echo
    [ "$times" -ne 0 ] && [ $turn -eq "$times" ] && break
    sleep "$interval"
done
