"""Names of Chinese supermarket products, made up from brands, kinds, flavours and sizes; for configs/products.yaml.

    python scripts/make_products.py --output data/products.txt
    lit_gpt fit --config configs/products.yaml

The brands are real, the products need not be: which kinds, flavours and sizes stand together is drawn at random, by the
seed. One name is one line, none stands twice.
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import dataclass
from pathlib import Path

from lit_gpt.files.atomic import atomic_write


@dataclass(frozen=True)
class Kind:
    """A kind of product: what it is called, and what may stand beside it."""

    names: tuple[str, ...]
    flavours: tuple[str, ...]
    sizes: tuple[str, ...]
    packs: tuple[str, ...]


_BOTTLES = ("250ml", "330ml", "500ml", "550ml", "1L", "1.5L", "2L")
_BAGS = ("30g", "50g", "75g", "100g", "150g", "200g", "300g")
KINDS: dict[str, Kind] = {
    "water": Kind(
        ("饮用天然水", "天然矿泉水", "纯净水", "苏打水", "气泡水"),
        ("", "无糖", "柠檬味", "白桃味", "长白山"),
        (*_BOTTLES, "4L", "5L"),
        ("单瓶", "12瓶整箱", "24瓶整箱", "家庭装"),
    ),
    "tea": Kind(
        ("绿茶", "红茶", "乌龙茶", "茉莉花茶", "冰红茶", "奶茶"),
        ("", "无糖", "低糖", "柠檬味", "蜜桃味", "蜂蜜"),
        _BOTTLES,
        ("单瓶", "6瓶装", "15瓶整箱"),
    ),
    "juice": Kind(
        ("果汁饮料", "100%果汁", "果粒饮料", "复合果蔬汁"),
        ("橙味", "苹果味", "葡萄味", "水蜜桃味", "芒果味", "西柚味"),
        _BOTTLES,
        ("单瓶", "6瓶装", "12瓶整箱"),
    ),
    "cola": Kind(
        ("汽水", "碳酸饮料", "可乐", "无糖可乐"),
        ("", "零度", "樱桃味", "香草味", "柠檬味"),
        ("200ml", "330ml", "500ml", "1.25L", "2L"),
        ("单罐", "6罐装", "12罐装", "24罐整箱"),
    ),
    "milk": Kind(
        ("纯牛奶", "高钙牛奶", "脱脂牛奶", "早餐奶", "儿童牛奶", "有机牛奶"),
        ("", "核桃味", "麦香味", "草莓味", "巧克力味"),
        ("200ml", "250ml", "1L"),
        ("单盒", "12盒礼盒装", "16盒整箱", "24盒整箱"),
    ),
    "yogurt": Kind(
        ("酸奶", "风味酸牛奶", "希腊酸奶", "乳酸菌饮品"),
        ("原味", "草莓味", "黄桃味", "蓝莓味", "芦荟味"),
        ("100g", "135g", "200g", "450g"),
        ("单杯", "6杯装", "8杯装", "12瓶装"),
    ),
    "ice": Kind(
        ("冰淇淋", "雪糕", "甜筒", "冰棍"),
        ("香草味", "巧克力味", "草莓味", "绿豆味", "抹茶味"),
        ("65g", "75g", "90g", "120g"),
        ("单支", "6支装", "10支家庭装"),
    ),
    "biscuit": Kind(
        ("夹心饼干", "威化饼干", "薄脆饼干", "巧克力棒", "迷你饼干"),
        ("原味", "巧克力味", "草莓味", "香草味", "抹茶味", "生日蛋糕味"),
        ("55g", "97g", "116g", "130g", "349g", "466g"),
        ("单包", "3连包", "家庭装", "礼盒装"),
    ),
    "bread": Kind(
        ("面包", "蛋糕", "蛋黄派", "吐司", "沙琪玛", "曲奇"),
        ("原味", "牛奶味", "红豆味", "肉松味", "香蕉味"),
        ("200g", "300g", "500g", "1kg"),
        ("袋装", "整箱", "早餐装"),
    ),
    "crisps": Kind(
        ("薯片", "薯条", "虾条", "玉米片", "锅巴"),
        ("原味", "黄瓜味", "番茄味", "烧烤味", "麻辣味", "海苔味"),
        _BAGS,
        ("袋装", "罐装", "分享装", "6包组合装"),
    ),
    "nuts": Kind(
        ("每日坚果", "夏威夷果", "碧根果", "腰果", "开心果", "瓜子", "核桃仁"),
        ("原味", "奶油味", "盐焗味", "五香味", "蟹黄味"),
        ("100g", "175g", "250g", "500g", "750g"),
        ("袋装", "罐装", "30包礼盒"),
    ),
    "noodles": Kind(
        ("方便面", "拌面", "米线", "粉丝", "自热火锅"),
        ("红烧牛肉味", "老坛酸菜味", "香菇炖鸡味", "番茄鸡蛋味", "麻辣味", "鲜虾鱼板味"),
        ("85g", "103g", "110g", "125g"),
        ("单桶", "5连包", "12桶整箱", "24袋整箱"),
    ),
    "chocolate": Kind(
        ("巧克力", "夹心巧克力", "巧克力豆", "巧克力排块"),
        ("牛奶味", "黑巧克力", "榛仁味", "白巧克力", "海盐味"),
        ("43g", "80g", "100g", "252g", "360g"),
        ("单条", "盒装", "碗装", "礼盒装"),
    ),
    "sauce": Kind(
        ("生抽酱油", "老抽", "蚝油", "米醋", "香辣酱", "豆瓣酱", "火锅底料"),
        ("", "零添加", "特级", "减盐", "麻辣"),
        ("150g", "280g", "500ml", "750ml", "1.28L", "1.9L"),
        ("单瓶", "2瓶装", "组合装"),
    ),
    "oil": Kind(
        ("花生油", "菜籽油", "玉米油", "大豆油", "葵花籽油", "东北大米", "小麦粉"),
        ("", "压榨一级", "非转基因", "有机"),
        ("1L", "2.5L", "5L", "5kg", "10kg"),
        ("单桶", "单袋", "2桶礼盒装"),
    ),
    "meat": Kind(
        ("火腿肠", "午餐肉", "辣条", "牛肉干", "鸡爪", "鸭脖", "卤蛋"),
        ("原味", "香辣味", "五香味", "泡椒味", "玉米味", "烧烤味"),
        ("40g", "65g", "106g", "198g", "270g", "340g"),
        ("袋装", "10支装", "罐装", "礼包"),
    ),
    "coffee": Kind(
        ("速溶咖啡", "拿铁咖啡", "美式咖啡", "咖啡饮料", "麦片"),
        ("", "原味", "无蔗糖", "特浓", "榛果味"),
        ("180ml", "268ml", "15g", "13g"),
        ("单瓶", "30条装", "48条装", "15瓶整箱"),
    ),
}
BRANDS_OF = {
    "water": "农夫山泉 怡宝 百岁山 依云 元气森林 康师傅 今麦郎 娃哈哈",
    "tea": "农夫山泉 怡宝 元气森林 康师傅 统一 娃哈哈 王老吉 加多宝 维他",
    "juice": "农夫山泉 芬达 统一 汇源 美汁源 味全",
    "cola": "可口可乐 百事可乐 雪碧 芬达 北冰洋",
    "milk": "蒙牛 伊利 光明 君乐宝 三元 特仑苏 旺旺 娃哈哈 维他 雀巢",
    "yogurt": "蒙牛 伊利 光明 君乐宝 三元 安慕希 味全",
    "ice": "蒙牛 伊利 光明 和路雪 钟薛高",
    "biscuit": "奥利奥 趣多多 嘉士利 格力高 达利园 好丽友 旺旺",
    "bread": "奥利奥 达利园 盼盼 好丽友 桃李 徐福记",
    "crisps": "乐事 上好佳 可比克 品客 盼盼 好丽友 旺旺",
    "nuts": "三只松鼠 良品铺子 百草味 洽洽 沃隆",
    "noodles": "康师傅 统一 今麦郎 白象 海底捞",
    "chocolate": "德芙 费列罗 士力架 好时 格力高 雀巢",
    "sauce": "海天 李锦记 老干妈 千禾 海底捞 鲁花",
    "oil": "金龙鱼 鲁花 福临门",
    "meat": "双汇 卫龙 周黑鸭 三只松鼠 良品铺子 百草味",
    "coffee": "雀巢 星巴克 三顿半 桂格",
}
"""The brands of each kind; a brand may make several."""


def all_names() -> list[str]:
    """Every name that can be made, in a fixed order; no two are equal."""
    names = {
        f"{brand}{flavour}{name} {size} {pack}": None
        for key, brands in BRANDS_OF.items()
        for brand in brands.split()
        for kind in (KINDS[key],)
        for name in kind.names
        for flavour in kind.flavours
        for size in kind.sizes
        for pack in kind.packs
    }
    return list(names)


def draw_names(count: int, seed: int) -> list[str]:
    """`count` of them at random, as many of each brand, in random order: the same for the same seed.

    Raises:
        ValueError: if there are not so many.
    """
    generator = random.Random(seed)
    by_brand: dict[str, list[str]] = {brand: [] for brands in BRANDS_OF.values() for brand in brands.split()}
    for name in all_names():
        by_brand[next(brand for brand in by_brand if name.startswith(brand))].append(name)
    most = len(by_brand) * min(map(len, by_brand.values()))
    if count > most:
        raise ValueError(f"at most {most:,} names")
    share, more = divmod(count, len(by_brand))
    drawn = [
        name
        for number, names in enumerate(by_brand.values())
        for name in generator.sample(names, share + (number < more))
    ]
    generator.shuffle(drawn)
    return drawn


def main() -> int:
    """Write the names to a file or to stdout."""
    summary, _, more = (__doc__ or "").partition("\n\n")
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=more, formatter_class=form)
    parser.add_argument("--lines", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="a file; stdout if it is left out")
    options = parser.parse_args()
    if options.lines < 1:
        parser.error(f"--lines {options.lines} must be above zero")
    try:
        text = "".join(f"{name}\n" for name in draw_names(options.lines, options.seed))
    except ValueError as error:
        parser.error(f"--lines {options.lines}: there are {error}")
    if options.output is None:
        sys.stdout.write(text)
        return 0
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(options.output, "w") as file:
        file.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
